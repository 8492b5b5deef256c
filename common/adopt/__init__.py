"""An old training script, read but never executed, as settings of this kit's scripts.

shell script --shell, words, conditions--> commands --command_line--> flags --table, values--> settings and remarks
"""
