"""What the federation is held against: other people's methods, and those who learn without a federation.

All of them see the same cases, start from the same public teacher where the method allows a start, train the
same student architecture by the same private step, and spend the same (ε, δ) at each site; a site's declared
size is its denominator and its weight. `registry` lists them.
"""
