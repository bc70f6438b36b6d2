package client

import (
	"io/fs"
	"syscall"
)

// inode tells two files of one name apart.
func inode(info fs.FileInfo) any {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return st.Ino
	}
	return nil
}
