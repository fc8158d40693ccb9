"""The rows of docs/compatibility.md, a module for each kind of them."""
