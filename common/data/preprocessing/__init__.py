"""Step 1: the job, its parts, the workers that encode them, and the merge of the parts."""
