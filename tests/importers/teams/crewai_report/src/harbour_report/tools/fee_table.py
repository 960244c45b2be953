raise RuntimeError("imports never run the code of a team")
