"""Loss-landscape geometry of neural networks while they train, as PyTorch Lightning callbacks."""
