"""What runs inside: scripts of the sandbox, started by path, with the standard library only and no way back out.

`evals.grading.sandbox` binds this folder into the sandbox; nothing here may import the rest of the package.
"""
