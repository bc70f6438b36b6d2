package mount

func child(what string) int { return 1 }
