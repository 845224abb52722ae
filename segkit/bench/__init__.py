"""The measured tables of the documents: memory and speed, each figure from a command that anyone can repeat."""
