"""What a run will do, settled and checked before any process of it starts."""
