// Package auth keeps workspaces and API keys and finds the principal of a
// request. It is the API server's Access.
//
// Each record is written to the side log first and then to the database, and
// carries a sequence: at start the two are compared, the higher sequence wins
// and the one that lags is brought up to date. A revocation counts as soon as
// either has it. Requests are answered from memory.
//
// Of a key only the SHA-256 of its text is kept; 256 random bits need no
// slower hash. The text is shown once, when the key is made, and never logged.
package auth
