"""What people read: the HTML page and terminal tables of a results folder, and verdicts on new parts."""
