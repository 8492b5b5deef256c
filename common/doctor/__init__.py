"""`python -m common.doctor`: whether this machine can run the kit."""
