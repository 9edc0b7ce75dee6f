// Reads a HAR file with har-validator (the schema) and har-to-k6 (an importer).
"use strict";
const fs = require("fs");
const validator = require("har-validator");
const { liHARToK6Script } = require("har-to-k6");
const har = JSON.parse(fs.readFileSync(process.argv[2], "utf8"));
(async () => {
  await validator.har(har);
  console.log(`har-validator: ${har.log.entries.length} entries`);
  // har-to-k6 takes "${...}" in any captured value for a variable of its own and refuses the file.
  har.log.entries = har.log.entries.filter((entry) => !JSON.stringify(entry.request).includes("${"));
  const { main } = await liHARToK6Script(har);
  if (!main.includes("http.post")) throw new Error("no request in the script");
  console.log(`har-to-k6: ${main.length} characters`);
})().catch((error) => {
  console.error(error.errors ?? error);
  process.exit(1);
});
