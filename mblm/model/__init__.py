"""What an MBLM computes: configuration, stage blocks, stage models and the hierarchy."""
