"""The feature bank: the frozen backbone's features of each volume, stored, and crops of them."""
