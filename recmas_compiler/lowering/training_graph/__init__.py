"""The program lowered to one module that trains its links."""
