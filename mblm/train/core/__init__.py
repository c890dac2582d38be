"""The trainer that all experiments share, and what it is made of."""
