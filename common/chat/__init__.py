"""Step 4: talk to an exported model, in the terminal or for a file of prompts."""
