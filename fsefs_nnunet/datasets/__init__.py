"""Public datasets to nnU-Net raw datasets, and assemblies of several."""
