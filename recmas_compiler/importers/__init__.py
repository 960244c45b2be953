"""Teams of other frameworks: their files become a `Team`, and a team becomes the text of a spec."""
