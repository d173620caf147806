"""The agent: a vision-language model, its value head, how it writes and how it is scored."""
