"""Equations: tensors and numbers in, tensors out. No config is seen here."""
