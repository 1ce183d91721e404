"""`--mode=check`: does all that a run needs work here?"""
