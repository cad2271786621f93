"""What nnU-Net calls a trainer."""
