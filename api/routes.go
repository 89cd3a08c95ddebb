package api

// allRoutes is the whole API, in the order of docs/api-extensions.md.
func allRoutes() []route {
	return []route{
		{"GET /v0/volumes", inWorkspace, Reader, "", false, listVolumes},
		{"POST /v0/volumes", inWorkspace, Writer, "volume.create", false, createVolume},
		{"GET /v0/volumes/{name}", inWorkspace, Reader, "", false, getVolume},
		{"PUT /v0/volumes/{name}", inWorkspace, Writer, "volume.update", false, updateVolume},
		{"DELETE /v0/volumes/{name}", inWorkspace, Writer, "volume.delete", false, deleteVolume},
		{"GET /v0/volumes/by-external-id/{externalId}", inWorkspace, Reader, "", false, getVolumeByExternalID},

		{"GET /v0/volumes/{name}/attachments", inWorkspace, Reader, "", false, listAttachments},
		{"POST /v0/volumes/{name}/attachments", inWorkspace, Writer, "attachment.create", false, createAttachment},
		{"GET /v0/volumes/{name}/attachments/{id}", inWorkspace, Reader, "", false, getAttachment},
		{"DELETE /v0/volumes/{name}/attachments/{id}", inWorkspace, Writer, "attachment.delete", false, deleteAttachment},

		{"GET /healthz", open, "", "", false, healthz},
		{"GET /readyz", open, "", "", false, readyz},
		{"GET /metrics", open, "", "", false, serveMetrics},
	}
}
