"""What a run will need and how long it will take, told beforehand: memory of a GPU, layouts that fit, tokens/s."""
