"""The quickstart's own data, tiny model and questions."""
