"""The same strategies on Flower: Ray simulation, and real devices behind a SuperLink.

Flower is imported in this folder only, its private parts in `compat` only. Importing the folder imports no Flower: a
machine without `fedprune[flower]` can run everything else.
"""
