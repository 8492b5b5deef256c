"""An exported model at work: its folder checked and loaded, prompts as training saw them, and their continuation."""
