"""Step 5: measure an exported model, by its loss on held-out rows and by choice tasks."""
