"""The interface to nnU-Net's commands: planning, draws of the support, links, shims, running them."""
