"""The feature bank: what a frozen backbone gives of each volume, stored, and crops of it."""
