"""Files of other machines, copied to this one; and the folder with what can be made again."""
