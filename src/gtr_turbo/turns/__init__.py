"""The record of one decision, and how records become padded tensors."""
