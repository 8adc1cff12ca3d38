"""`tadistill watch`: a local web page that shows a running or finished study. It changes no files, and reads long logs in pieces."""
