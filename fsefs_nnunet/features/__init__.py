"""The feature bank: what a frozen backbone gives of each volume, stored once, and crops of it."""
