"""`dolly batch`: many instructions from a file, answered into a file that a killed run goes on with."""
