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
		{"PUT /v0/volumes/{name}/attachments/{id}/limits", inWorkspace, Writer, "attachment.limits", false, setLimits},

		{"GET /v0/volumes/{name}/stats", inWorkspace, Reader, "", false, getStats},
		{"POST /v0/volumes/{name}/trim", inWorkspace, Writer, "volume.trim", false, trimVolume},
		{"POST /v0/volumes/{name}/freeze", inWorkspace, Writer, "volume.freeze", false, freezeVolume},
		{"POST /v0/volumes/{name}/thaw", inWorkspace, Writer, "volume.thaw", false, thawVolume},
		{"POST /v0/volumes/{name}/capture", inWorkspace, Writer, "volume.capture", true, captureVolume},

		{"GET /v0/volumes/{name}/files", inWorkspace, Reader, "", false, listFiles},
		{"GET /v0/volumes/{name}/files/content", inWorkspace, Reader, "", true, readFile},

		{"GET /v0/volume_templates", inWorkspace, Reader, "", false, listTemplates},
		{"POST /v0/volume_templates", inWorkspace, Writer, "template.create", false, createTemplate},
		{"GET /v0/volume_templates/{name}", inWorkspace, Reader, "", false, getTemplate},
		{"PUT /v0/volume_templates/{name}", inWorkspace, Writer, "template.update", false, updateTemplate},
		{"DELETE /v0/volume_templates/{name}", inWorkspace, Writer, "template.delete", false, deleteTemplate},
		{"DELETE /v0/volume_templates/{name}/versions/{version}", inWorkspace, Writer, "template.version.delete", false, deleteVersion},
		{"GET /v0/volume_templates/{name}/history", inWorkspace, Reader, "", false, templateHistory},
		{"POST /v0/volume_templates/{name}/rollback", inWorkspace, Writer, "template.rollback", false, rollbackTemplate},
		{"PUT /v0/volume_templates/{name}/versions/{version}/pin", inWorkspace, Writer, "template.version.pin", false, pinVersion},
		{"DELETE /v0/volume_templates/{name}/versions/{version}/pin", inWorkspace, Writer, "template.version.unpin", false, unpinVersion},
		{"POST /v0/volume_templates/{name}/versions/{version}/verify", inWorkspace, Writer, "template.version.verify", true, verifyVersion},
		{"POST /v0/volume_templates/{name}/import", inWorkspace, Writer, "template.version.import", true, importVersion},
		{"GET /v0/volume_templates/{name}/diff", inWorkspace, Reader, "", true, diffTemplate},
		{"GET /v0/volume_templates/{name}/archive", inWorkspace, Reader, "", true, templateArchive},
		{"POST /uploads/{id}/known", open, "", "", true, knownChunks},
		{"PUT /uploads/{id}/delta", open, "", "template.version.upload", true, receiveDelta},
		{"PUT /uploads/{id}", open, "", "template.version.upload", true, receiveUpload},

		{"GET /v0/sandboxes", inWorkspace, Reader, "", false, listSandboxes},
		{createSandboxPattern, inWorkspace, Writer, "sandbox.create", false, createSandbox},
		{"GET /v0/sandboxes/{name}", inWorkspace, Reader, "", false, getSandbox},
		{"PUT /v0/sandboxes/{name}", inWorkspace, Writer, "sandbox.update", false, updateSandbox},
		{"DELETE /v0/sandboxes/{name}", inWorkspace, Writer, "sandbox.delete", false, deleteSandbox},
		{"GET /v0/sandboxes/by-external-id/{externalId}", inWorkspace, Reader, "", false, getSandboxByExternalID},

		{"GET /v0/sandboxes/{name}/run/process", inWorkspace, Reader, "", false, listProcesses},
		{"POST /v0/sandboxes/{name}/run/process", inWorkspace, Writer, "sandbox.exec", true, createProcess},
		{"GET /v0/sandboxes/{name}/run/process/{process}", inWorkspace, Reader, "", false, getProcess},
		{"DELETE /v0/sandboxes/{name}/run/process/{process}", inWorkspace, Writer, "sandbox.process.stop", false, stopProcess},
		{"DELETE /v0/sandboxes/{name}/run/process/{process}/kill", inWorkspace, Writer, "sandbox.process.kill", false, killProcess},
		{"GET /v0/sandboxes/{name}/run/process/{process}/logs", inWorkspace, Reader, "", false, getProcessLogs},
		{"GET /v0/sandboxes/{name}/run/process/{process}/logs/stream", inWorkspace, Reader, "", true, followProcess},
		{"POST /v0/sandboxes/{name}/run/process/{process}/stdin", inWorkspace, Writer, "sandbox.process.stdin", true, writeStdin},
		{"DELETE /v0/sandboxes/{name}/run/process/{process}/stdin", inWorkspace, Writer, "sandbox.process.stdin", false, closeStdin},

		{"GET /v0/sandboxes/{name}/run/filesystem/{path}", inWorkspace, Reader, "", true, getSandboxFile},
		{"PUT /v0/sandboxes/{name}/run/filesystem/{path}", inWorkspace, Writer, "sandbox.file.write", true, putSandboxFile},
		{"DELETE /v0/sandboxes/{name}/run/filesystem/{path}", inWorkspace, Writer, "sandbox.file.delete", false, deleteSandboxFile},
		{"PUT /v0/sandboxes/{name}/run/filesystem/tree/{path}", inWorkspace, Writer, "sandbox.file.write", true, putSandboxTree},
		{"POST /v0/sandboxes/{name}/run/filesystem-multipart/initiate/{path}", inWorkspace, Writer, "sandbox.file.write", true, beginParts},
		{"PUT /v0/sandboxes/{name}/run/filesystem-multipart/{upload}/part", inWorkspace, Writer, "sandbox.file.write", true, putPart},
		{"POST /v0/sandboxes/{name}/run/filesystem-multipart/{upload}/complete", inWorkspace, Writer, "sandbox.file.write", true, joinParts},
		{"DELETE /v0/sandboxes/{name}/run/filesystem-multipart/{upload}/abort", inWorkspace, Writer, "sandbox.file.write", false, abortParts},

		{"GET /v0/keys", mayNameWorkspace, Admin, "", false, listKeys},
		{"POST /v0/keys", mayNameWorkspace, Admin, "key.create", false, createKey},
		{"DELETE /v0/keys/{id}", mayNameWorkspace, Admin, "key.revoke", false, revokeKey},
		{"POST /v0/oauth/token", open, "", "", false, createToken},
		{"POST /oauth/token", open, "", "", false, createToken},

		{"GET /v0/workspaces", mayNameWorkspace, Reader, "", false, listWorkspaces},
		{"POST /v0/workspaces", onNode, Admin, "workspace.create", false, createWorkspace},
		{"GET /v0/workspaces/{name}", mayNameWorkspace, Reader, "", false, getWorkspace},
		{"PUT /v0/workspaces/{name}", onNode, Admin, "workspace.update", false, updateWorkspace},
		{"GET /v0/workspaces/{name}/quota", mayNameWorkspace, Reader, "", false, getQuota},
		{"PUT /v0/workspaces/{name}/quota", onNode, Admin, "quota.update", false, updateQuota},

		{"GET /v0/features", inWorkspace, Reader, "", false, listFeatures},
		{"GET /v0/whoami", mayNameWorkspace, Reader, "", false, whoami},
		{"GET /v0/events", mayNameWorkspace, Reader, "", false, listEvents},

		{"GET /v0/pools", onNode, Reader, "", false, listPools},
		{"GET /v0/doctor", onNode, Reader, "", false, listChecks},
		{"GET /v0/audit", mayNameWorkspace, Admin, "", false, listAudit},

		{"GET /ui", open, "", "", false, servePage},
		{"GET /openapi.json", open, "", "", false, serveOpenAPI},
		{"GET /healthz", open, "", "", false, healthz},
		{"GET /readyz", open, "", "", false, readyz},
		{"GET /metrics", open, "", "", false, serveMetrics},
	}
}
