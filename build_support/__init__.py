"""How the compiled part is built: setup.py uses it, and so do the checks in tools/.

Nothing here imports torch: of torch its headers and libraries are enough, so that a build finds it
from an isolated environment too, and one build can be for several versions.
"""
