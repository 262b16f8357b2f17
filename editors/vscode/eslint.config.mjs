import tseslint from "typescript-eslint";

export default tseslint.config(
    { ignores: ["dist/", "dist-test/", "node_modules/", "scripts/", "eslint.config.mjs"] },
    ...tseslint.configs.strictTypeChecked,
    ...tseslint.configs.stylisticTypeChecked,
    {
        languageOptions: {
            parserOptions: { projectService: true, tsconfigRootDir: import.meta.dirname },
        },
        rules: {
            "@typescript-eslint/restrict-template-expressions": ["error", { allowNumber: true }],
            "@typescript-eslint/explicit-module-boundary-types": "error",
        },
    },
    {
        // node:test takes the promise that test() returns itself.
        files: ["test/**"],
        rules: { "@typescript-eslint/no-floating-promises": "off" },
    },
);
