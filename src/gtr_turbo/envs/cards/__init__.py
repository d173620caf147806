"""The card games of RL4VLM (gym-cards), drawn and ruled by our own code."""
