"""`python -m common.doctor`: whether this machine, as it is, can run the kit."""
