"""`dolly bench`: how fast it is here, beside what this machine can do at best and beside other engines."""
