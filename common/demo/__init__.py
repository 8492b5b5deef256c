"""The quickstart: its sample data, tiny model and questions."""
