"""The house as its imports say it is: floors, rooms and arrows. python -m longreach.lab.house

Draws docs/house.svg. The tests of the house read the same imports.
"""
