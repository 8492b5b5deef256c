"""What a run trains, saves and loads: weights, optimizer, schedule, random state, position in the data."""
