"""What rooms need of each other and users do not; it may change at any time.

`orthax.internal.ROOM` has such names of one room. A room imports from the rooms below
it by their public names, and by these.
"""
