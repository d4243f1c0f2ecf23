"""A whole study: methods x data x label budgets x seeds as cells that are computed once, and the report on them.

`config` reads what is asked, `cells` makes the grid of it, `work` computes one cell, `store` keeps what was computed,
`runner` goes through the grid, `report` writes what was found.
"""
