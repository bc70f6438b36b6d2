package source

import "context"

// ListPages lists everything below prefix through p.
func ListPages(ctx context.Context, p Pager, prefix string, yield func(Object) error) error {
	after := ""
	for {
		page, err := p.Page(ctx, PageRequest{Prefix: prefix, After: after})
		if err != nil {
			return err
		}
		for _, o := range page.Objects {
			if err := yield(o); err != nil {
				return err
			}
			after = o.Key
		}
		if !page.More {
			return nil
		}
	}
}
