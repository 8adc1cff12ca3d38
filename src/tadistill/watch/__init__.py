"""A page on this machine that shows a running or finished study. It only reads files, and it reads long logs piece by piece."""
