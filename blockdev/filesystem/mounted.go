package filesystem

import "fmt"

// growUnmounted is the offline growth of types that only grow mounted: being
// grown already is success.
func growUnmounted(path string, sizeOf func(string) (int64, error)) error {
	device, err := deviceSize(path)
	if err != nil {
		return err
	}
	size, err := sizeOf(path)
	if err != nil {
		return err
	}
	if size > device {
		return damaged("filesystem of %d bytes on a device of %d bytes", size, device)
	}
	if device-size < growthUnit {
		return nil
	}
	return fmt.Errorf("%w: it has %d of %d bytes", ErrNeedsMount, size, device)
}

// growthUnit is what a filesystem may leave unused at its end, in bytes.
const growthUnit = MiB
