"""Losses on labelled volumes: L_SEG of the support, and Eq. (1) of pretraining."""
