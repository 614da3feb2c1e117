"""The builder of `data/icons`: IconPark's icons of things that one can see, in four styles."""
